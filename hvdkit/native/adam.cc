// Adam in one pass over memory: HvdkitAdam for dense gradients, HvdkitSparseAdam for those of rows.
//
// Keras' Adam is a dozen operations on arrays as large as the weights, thirty readings and writings of them in all. Here
// gradient, weight and moments are read once. TensorFlow's own ResourceApplyAdam does that, too, but takes 1 - β in the
// precision of the weights, where of 0.001 four digits are left, and needs a gradient for every row of an embedding.
// Each number goes through the operations of keras.optimizers.Adam in their order, so the results are the same bits.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <vector>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::Var;

constexpr int kCyclesANumber = 10;  // for TensorFlow, which shares the numbers out among its threads

// One step of Adam for the weights of one variable, which nobody else reads or writes meanwhile.
template <typename T>
class Step {
 public:
  // The inputs 0 to 2 are weights and moments, the last four α, 1 - β1, 1 - β2 and ε.
  absl::Status Open(OpKernelContext* context) {
    for (int i = 0; i < 3; ++i) {
      const auto& handle = tensorflow::HandleFromInput(context, i);
      TF_RETURN_IF_ERROR(tensorflow::LookupResource(context, handle, &variables_[i]));
    }
    Lock();
    if (!variables_[0]->is_initialized) return absl::FailedPreconditionError("Adam's weights are not there yet.");
    for (int i = 0; i < 3; ++i) TF_RETURN_IF_ERROR(OpenNumbers(context, i));
    for (int i = 0; i < 4; ++i) scalars_[i] = context->input(context->num_inputs() - 4 + i).scalar<T>()();
    return absl::OkStatus();
  }

  const TensorShape& shape() const { return variables_[0]->tensor()->shape(); }

  // Updates the weights from `begin` on, by their gradients and the squares of these. Null stands for zeros.
  void Update(size_t begin, size_t count, const T* gradients, const T* squares) const {
    if (!gradients) {
      Loop(begin, count, [](size_t) { return T(0); }, [](size_t) { return T(0); });
    } else if (!squares) {
      Loop(begin, count, [=](size_t i) { return gradients[i]; }, [=](size_t i) { return gradients[i] * gradients[i]; });
    } else {
      Loop(begin, count, [=](size_t i) { return gradients[i]; }, [=](size_t i) { return squares[i]; });
    }
  }

 private:
  // In the order of their addresses, so that no two steps wait for each other.
  void Lock() {
    std::set<tensorflow::mutex*> mutexes;
    for (const auto& variable : variables_) mutexes.insert(variable->mu());
    for (tensorflow::mutex* mutex : mutexes) locks_.push_back(std::make_unique<tensorflow::mutex_lock>(*mutex));
  }

  // Numbers that are changed where they are. While others have them, too (a value that was read before and is still in
  // use), the variable gets a copy of its own first.
  absl::Status OpenNumbers(OpKernelContext* context, int i) {
    Tensor* tensor = variables_[i]->tensor();
    if (tensor->dtype() != tensorflow::DataTypeToEnum<T>::value || tensor->shape() != shape()) {
      return absl::InvalidArgumentError("Adam's weights and moments must be of one dtype and shape.");
    }
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(context->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      std::memcpy(copy.data(), tensor->data(), tensor->TotalBytes());
      *tensor = copy;
    }
    numbers_[i] = static_cast<T*>(tensor->data());
    return absl::OkStatus();
  }

  template <typename Gradient, typename Square>
  void Loop(size_t begin, size_t count, Gradient gradient, Square square) const {
    T* __restrict weights = numbers_[0] + begin;
    T* __restrict m = numbers_[1] + begin;
    T* __restrict v = numbers_[2] + begin;
    const auto [alpha, rest_1, rest_2, epsilon] = scalars_;
    for (size_t i = 0; i < count; ++i) {
      m[i] += (gradient(i) - m[i]) * rest_1;
      v[i] += (square(i) - v[i]) * rest_2;
      weights[i] -= (m[i] * alpha) / (std::sqrt(v[i]) + epsilon);
    }
  }

  tensorflow::core::RefCountPtr<Var> variables_[3];
  std::vector<std::unique_ptr<tensorflow::mutex_lock>> locks_;  // given back before the variables are
  T* numbers_[3];
  std::array<T, 4> scalars_;
};

template <typename Work>
void ShareOut(OpKernelContext* context, int64_t total, int64_t numbers_each, const Work& work) {
  context->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(total, kCyclesANumber * numbers_each, work);
}

template <typename T>
class Adam : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor& gradient = context->input(3);
    Step<T> step;
    OP_REQUIRES_OK(context, step.Open(context));
    OP_REQUIRES(context, gradient.shape() == step.shape(),
                absl::InvalidArgumentError("Adam's gradients must have the shape of the weights."));
    const T* from = gradient.flat<T>().data();
    ShareOut(context, gradient.NumElements(), 1,
             [&](int64_t begin, int64_t end) { step.Update(begin, end - begin, from + begin, nullptr); });
  }
};

// All rows move, as their moments are there, and those that are named have a gradient besides. A row that is named twice
// has the sum of both gradients, and the sum of both squares: Keras' Adam has it so.
template <typename T, typename Index>
class SparseAdam : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* context) override {
    const Tensor &values = context->input(3), &indices = context->input(4);
    Step<T> step;
    OP_REQUIRES_OK(context, step.Open(context));
    const TensorShape& shape = step.shape();
    const int64_t rows = shape.dims() ? shape.dim_size(0) : 0, width = rows ? shape.num_elements() / rows : 0;
    OP_REQUIRES(context, values.NumElements() == indices.NumElements() * width,
                absl::InvalidArgumentError("Adam's gradients of rows must be as wide as the rows."));
    std::vector<int64_t> place(rows, -1);  // of a row's sums, among those that are named
    std::vector<T> gradients, squares;
    OP_REQUIRES_OK(context, AddUp(values.flat<T>().data(), indices.flat<Index>(), width, &place, &gradients, &squares));
    ShareOut(context, rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = place[row] * width;
        if (place[row] < 0) {
          step.Update(row * width, width, nullptr, nullptr);
        } else {
          step.Update(row * width, width, gradients.data() + at, squares.data() + at);
        }
      }
    });
  }

 private:
  static absl::Status AddUp(const T* value, typename tensorflow::TTypes<Index>::ConstFlat indices, int64_t width,
                            std::vector<int64_t>* place, std::vector<T>* gradients, std::vector<T>* squares) {
    for (int64_t i = 0; width && i < indices.size(); ++i, value += width) {
      const int64_t row = indices(i), rows = place->size();
      if (row < 0) continue;  // as tf.math.unsorted_segment_sum, and so Keras, leaves it out
      if (row >= rows) return absl::InvalidArgumentError("A gradient is of a row that is not there.");
      if ((*place)[row] < 0) {
        (*place)[row] = gradients->size() / width;
        gradients->resize(gradients->size() + width);
        squares->resize(squares->size() + width);
      }
      T *sum = gradients->data() + (*place)[row] * width, *square = squares->data() + (*place)[row] * width;
      for (int64_t j = 0; j < width; ++j) {
        sum[j] += value[j];
        square[j] += value[j] * value[j];
      }
    }
    return absl::OkStatus();
  }
};

}  // namespace

REGISTER_OP("HvdkitAdam")
    .Input("weights: resource")
    .Input("m: resource")
    .Input("v: resource")
    .Input("gradients: T")
    .Input("alpha: T")
    .Input("rest_1: T")
    .Input("rest_2: T")
    .Input("epsilon: T")
    .Attr("T: {float, double}")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

REGISTER_OP("HvdkitSparseAdam")
    .Input("weights: resource")
    .Input("m: resource")
    .Input("v: resource")
    .Input("values: T")
    .Input("indices: Index")
    .Input("alpha: T")
    .Input("rest_1: T")
    .Input("rest_2: T")
    .Input("epsilon: T")
    .Attr("T: {float, double}")
    .Attr("Index: {int32, int64}")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs);

#define REGISTER_SPARSE(T, Index)                                          \
  REGISTER_KERNEL_BUILDER(Name("HvdkitSparseAdam")                         \
                              .Device(tensorflow::DEVICE_CPU)              \
                              .TypeConstraint<T>("T")                      \
                              .TypeConstraint<Index>("Index"),             \
                          SparseAdam<T, Index>)
#define REGISTER(T)                                                                                             \
  REGISTER_KERNEL_BUILDER(Name("HvdkitAdam").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), Adam<T>);   \
  REGISTER_SPARSE(T, int32_t);                                                                                  \
  REGISTER_SPARSE(T, int64_t)
REGISTER(float);
REGISTER(double);
