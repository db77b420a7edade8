// Adam in one pass over memory: HvdkitAdam for dense gradients, HvdkitSparseAdam for gradients of rows.
//
// Keras' Adam runs a dozen operations on arrays as large as the weights: about thirty reads and writes of memory. Here,
// gradient, weight and moments are read once. TensorFlow's own ResourceApplyAdam does that, too. But it computes 1 - β
// in the precision of the weights, which leaves four digits of 0.001, and it needs a gradient for every embedding row.
// Each element goes through the operations of keras.optimizers.Adam in the same order: results are bit-identical.
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

constexpr int kCyclesPerElement = 10;  // TensorFlow's cost estimate, which decides how to divide work over threads

// One step of Adam for the weights of one variable. It holds the variable's lock meanwhile.
template <typename T>
class Step {
 public:
  // Inputs 0 to 2 are the weights and moments, the last four are α, 1 - β1, 1 - β2 and ε.
  absl::Status Open(OpKernelContext* context) {
    for (int i = 0; i < 3; ++i) {
      const auto& handle = tensorflow::HandleFromInput(context, i);
      TF_RETURN_IF_ERROR(tensorflow::LookupResource(context, handle, &variables_[i]));
    }
    Lock();
    if (!variables_[0]->is_initialized) return absl::FailedPreconditionError("Adam's weights are not initialized.");
    for (int i = 0; i < 3; ++i) TF_RETURN_IF_ERROR(OpenElements(context, i));
    for (int i = 0; i < 4; ++i) scalars_[i] = context->input(context->num_inputs() - 4 + i).scalar<T>()();
    return absl::OkStatus();
  }

  const TensorShape& shape() const { return variables_[0]->tensor()->shape(); }

  // Updates `count` weights from `begin` on with their gradients and squared gradients. Null means zeros.
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
  // Locks in the order of the addresses, to avoid a deadlock between two steps.
  void Lock() {
    std::set<tensorflow::mutex*> mutexes;
    for (const auto& variable : variables_) mutexes.insert(variable->mu());
    for (tensorflow::mutex* mutex : mutexes) locks_.push_back(std::make_unique<tensorflow::mutex_lock>(*mutex));
  }

  // Prepares an update in place. If the buffer is shared (an earlier read of the variable is still in use), the
  // variable gets its own copy first.
  absl::Status OpenElements(OpKernelContext* context, int i) {
    Tensor* tensor = variables_[i]->tensor();
    if (tensor->dtype() != tensorflow::DataTypeToEnum<T>::value || tensor->shape() != shape()) {
      return absl::InvalidArgumentError("Adam's weights and moments must have the same dtype and shape.");
    }
    if (!tensor->RefCountIsOne()) {
      Tensor copy;
      TF_RETURN_IF_ERROR(context->allocate_temp(tensor->dtype(), tensor->shape(), &copy));
      std::memcpy(copy.data(), tensor->data(), tensor->TotalBytes());
      *tensor = copy;
    }
    elements_[i] = static_cast<T*>(tensor->data());
    return absl::OkStatus();
  }

  template <typename Gradient, typename Square>
  void Loop(size_t begin, size_t count, Gradient gradient, Square square) const {
    T* __restrict weights = elements_[0] + begin;
    T* __restrict m = elements_[1] + begin;
    T* __restrict v = elements_[2] + begin;
    const auto [alpha, rest_1, rest_2, epsilon] = scalars_;
    for (size_t i = 0; i < count; ++i) {
      m[i] += (gradient(i) - m[i]) * rest_1;
      v[i] += (square(i) - v[i]) * rest_2;
      weights[i] -= (m[i] * alpha) / (std::sqrt(v[i]) + epsilon);
    }
  }

  tensorflow::core::RefCountPtr<Var> variables_[3];
  std::vector<std::unique_ptr<tensorflow::mutex_lock>> locks_;  // declared after variables_: released before them
  T* elements_[3];
  std::array<T, 4> scalars_;
};

template <typename Work>
void ParallelFor(OpKernelContext* context, int64_t total, int64_t elements_each, const Work& work) {
  auto* workers = context->device()->tensorflow_cpu_worker_threads()->workers;
  workers->ParallelFor(total, kCyclesPerElement * elements_each, work);
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
    ParallelFor(context, gradient.NumElements(), 1,
                [&](int64_t begin, int64_t end) { step.Update(begin, end - begin, from + begin, nullptr); });
  }
};

// Updates all rows, because each has moments; rows in `indices` also have a gradient. If `indices` has a row twice, its
// gradient is the sum of both gradients, and its square the sum of both squares, as in Keras' Adam.
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
    std::vector<int64_t> place(rows, -1);  // index of a row's sums in gradients and squares; -1 if it has no gradient
    std::vector<T> gradients, squares;
    OP_REQUIRES_OK(context,
                   SumRows(values.flat<T>().data(), indices.flat<Index>(), width, &place, &gradients, &squares));
    ParallelFor(context, rows, width, [&](int64_t begin, int64_t end) {
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
  static absl::Status SumRows(const T* value, typename tensorflow::TTypes<Index>::ConstFlat indices, int64_t width,
                              std::vector<int64_t>* place, std::vector<T>* gradients, std::vector<T>* squares) {
    for (int64_t i = 0; width && i < indices.size(); ++i, value += width) {
      const int64_t row = indices(i), rows = place->size();
      if (row < 0) continue;  // skipped, as in tf.math.unsorted_segment_sum and so in Keras
      if (row >= rows) return absl::InvalidArgumentError("A gradient has the index of a row that does not exist.");
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
