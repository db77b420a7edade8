// An executor that runs a graph on the thread that calls it.
//
// TensorFlow's own hands operations that are ready at the same time to a pool of threads. On a single core these threads
// only wait for each other, and where the kernel does not preempt, until its next tick. Here all operations run one after
// another on the calling thread, except for those that are asynchronous, such as reading from a data set: what follows
// one of them runs on the thread that ends it. Control flow works as in TensorFlow's own executor, which does the work.
#include "tensorflow/core/common_runtime/executor.h"

#include <memory>
#include <utility>

#include "tensorflow/core/common_runtime/executor_factory.h"
#include "tensorflow/core/common_runtime/local_executor_params.h"

namespace hvdkit {
namespace {

using tensorflow::Executor;

class InlineExecutor : public Executor {
 public:
  explicit InlineExecutor(Executor* executor) : executor_(executor) {}

 private:
  void RunAsyncInternal(const Args& args, DoneCallback done) override {
    Args here = args;
    here.run_all_kernels_inline = true;
    here.runner = [](Args::Closure closure) { closure(); };
    executor_->RunAsync(here, std::move(done));
  }

  std::unique_ptr<Executor> executor_;
};

class InlineExecutorFactory : public tensorflow::ExecutorFactory {
 public:
  absl::Status NewExecutor(const tensorflow::LocalExecutorParams& params, const tensorflow::Graph& graph,
                           std::unique_ptr<Executor>* made) override {
    Executor* executor = nullptr;
    TF_RETURN_IF_ERROR(tensorflow::NewLocalExecutor(params, graph, &executor));
    *made = std::make_unique<InlineExecutor>(executor);
    return absl::OkStatus();
  }
};

const bool is_registered = [] {
  tensorflow::ExecutorFactory::Register("HVDKIT_INLINE", new InlineExecutorFactory);
  return true;
}();

}  // namespace
}  // namespace hvdkit
