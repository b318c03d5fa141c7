#include "tensors.h"

#include <array>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "launch.h"

namespace cuda_on_cpu {
namespace {

using transfuse::Call;
using transfuse::NamedTensor;
using transfuse::Role;
using transfuse::TensorView;

constexpr size_t kItemBytes[transfuse::kDTypes] = {4, 2, 2, 4, 8, 1};
constexpr uint8_t kOwned = 1, kWritten = 2;

using Index = std::array<int64_t, TensorView::kMaxDims>;

size_t item_bytes(const TensorView& view) { return kItemBytes[static_cast<int>(view.dtype)]; }

int64_t elements(const TensorView& view) {
  int64_t count = 1;
  for (int d = 0; d < view.ndim; ++d) count *= view.sizes[d];
  return count;
}

// Bytes from the first element to the end of the last.
size_t span(const TensorView& view) {
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.sizes[d] - 1) * view.strides[d];
  return elements(view) == 0 ? 0 : (last + 1) * item_bytes(view);
}

// Calls visit(offset in bytes, index) for every element, the last index fastest, until one returns true.
template <typename F>
void each_element(const TensorView& view, F visit) {
  Index index{};
  const int64_t count = elements(view);
  for (int64_t i = 0; i < count; ++i) {
    int64_t offset = 0;
    for (int d = 0; d < view.ndim; ++d) offset += index[d] * view.strides[d];
    if (visit(static_cast<size_t>(offset) * item_bytes(view), index)) return;
    for (int d = view.ndim - 1; d >= 0 && ++index[d] == view.sizes[d]; --d) index[d] = 0;
  }
}

struct Tensor {
  const NamedTensor* named;
  const unsigned char *begin, *end;
  std::vector<uint8_t> shadow;  // a byte for each byte; empty: all are owned and written

  explicit Tensor(const NamedTensor& named)
      : named(&named), begin(named.tensor->as<unsigned char>()), end(begin + span(*named.tensor)) {
    const TensorView& view = *named.tensor;
    const bool starts_unwritten = named.role == Role::Output || named.role == Role::Workspace;
    const size_t bytes = end - begin;
    if (!starts_unwritten && bytes <= elements(view) * item_bytes(view)) return;
    const uint8_t owned = starts_unwritten ? kOwned : kOwned | kWritten;
    if (bytes == elements(view) * item_bytes(view)) {
      shadow.assign(bytes, owned);
      return;
    }
    shadow.assign(bytes, 0);
    each_element(view, [&](size_t offset, const Index&) {
      memset(&shadow[offset], owned, item_bytes(view));
      return false;
    });
  }

  std::string text() const { return std::string(named->name) + " " + describe(*named->tensor); }

  // Empty if this tensor allows the access, else why it does not.
  std::string refuse(const unsigned char* at, size_t bytes, Access kind) {
    const bool writes = kind == Access::Write || kind == Access::Atomic, reads = kind != Access::Write;
    if (writes && named->role == Role::Input) {
      return "writes to " + text() + ", which its Call lists as an input: give it its Role in the launcher";
    }
    if (shadow.empty()) return "";
    for (size_t i = at - begin; i < size_t(at - begin) + bytes; ++i) {
      if (!(shadow[i] & kOwned))
        return "out of bounds: between the elements of " + text() + ", at byte " + std::to_string(i);
      if (reads && !(shadow[i] & kWritten))
        return "reads byte " + std::to_string(i) + " of " + text() + ", which nothing has written";
    }
    if (writes) memset(&shadow[at - begin], kOwned | kWritten, bytes);
    return "";
  }

  // Why this tensor, an output, is not complete; empty if it is.
  std::string unwritten() const {
    int64_t missing = 0;
    std::string first;
    if (!memchr(shadow.data(), kOwned, shadow.size())) return "";
    each_element(*named->tensor, [&](size_t offset, const Index& index) {
      if (shadow[offset] & kWritten) return false;
      for (int d = 0; missing == 0 && d < named->tensor->ndim; ++d) first += (d ? ", " : "") + std::to_string(index[d]);
      ++missing;
      return false;
    });
    return "output " + text() + " was left unwritten at (" + first + "), " + std::to_string(missing) +
           " elements in all";
  }
};

struct Registry {
  const Call* call = nullptr;
  std::vector<Tensor> tensors;

  void take(const Call& of) {
    if (call == &of) return;
    call = &of;
    tensors.clear();
    for (const NamedTensor& named : of) {
      if (named.tensor && elements(*named.tensor) > 0) tensors.emplace_back(named);
    }
  }
};

Registry& registry() {
  static thread_local Registry mine;
  return mine;
}

}  // namespace

std::string global_access(const unsigned char* at, size_t bytes, Access kind) {
  std::string reason;
  bool allowed = false;
  for (Tensor& tensor : registry().tensors) {  // views of one storage may overlap: one that allows it is enough
    if (at < tensor.begin || at + bytes > tensor.end) continue;
    const std::string refusal = tensor.refuse(at, bytes, kind);
    if (refusal.empty()) {
      allowed = true;
    } else if (reason.empty()) {
      reason = refusal;
    }
  }
  if (allowed) return "";
  if (!reason.empty()) return reason;
  const char* verb = kind == Access::Read ? "read" : "write";
  return text("%zu-byte %s out of bounds: %s", bytes, verb, place(at, bytes).c_str());
}

std::string place(const unsigned char* at, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  if (address < 65536) return text("address %zu: a null pointer, so an absent tensor", size_t(address));
  const Tensor* nearest = nullptr;
  size_t distance = 1 << 20;
  for (const Tensor& tensor : registry().tensors) {
    const size_t away = at + bytes > tensor.end ? at + bytes - tensor.end : at < tensor.begin ? tensor.begin - at : 0;
    if (away >= distance) continue;
    distance = away;
    nearest = &tensor;
  }
  if (!nearest)
    return text("address %p, in no tensor of the call (list all that the kernel touches)",
                static_cast<const void*>(at));
  if (at < nearest->begin) return text("%zu bytes before %s", size_t(nearest->begin - at), nearest->text().c_str());
  if (distance == 0) return text("byte %zu of %s", size_t(at - nearest->begin), nearest->text().c_str());
  return text("up to %zu bytes past the end of %s", distance, nearest->text().c_str());
}

}  // namespace cuda_on_cpu

// In place of csrc/launch.cu: there is no device to make current, but the moment to learn what a launch may touch.
namespace transfuse {

DeviceGuard::DeviceGuard(int device, const Call& call) : device_(device) { cuda_on_cpu::registry().take(call); }

DeviceGuard::~DeviceGuard() = default;

Call::~Call() noexcept(false) {
  auto& registry = cuda_on_cpu::registry();
  std::string error;
  if (std::uncaught_exceptions() == 0 && !cuda_on_cpu::only_noting()) {
    registry.take(*this);
    for (const auto& tensor : registry.tensors) {
      if (error.empty() && tensor.named->role == Role::Output) error = tensor.unwritten();
    }
  }
  registry.call = nullptr;
  registry.tensors.clear();
  if (!error.empty())
    throw std::runtime_error("cuda_on_cpu: " + std::string(op) + ": " + error +
                             ": the kernel's grid or mask misses it");
}

}  // namespace transfuse
