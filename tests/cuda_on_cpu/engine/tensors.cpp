#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "internal.h"
#include "launch.h"

namespace cuda_on_cpu {
namespace {

using transfuse::Call;
using transfuse::NamedTensor;
using transfuse::Role;
using transfuse::TensorView;

constexpr size_t kItemBytes[transfuse::kDTypes] = {4, 2, 2, 4, 8, 1};
constexpr uint8_t kOwned = 1, kWritten = 2;

int64_t elements(const TensorView& view) {
  int64_t count = 1;
  for (int d = 0; d < view.ndim; ++d) count *= view.sizes[d];
  return count;
}

struct Tensor {
  const char* name;
  const TensorView* view;
  Role role;
  size_t item, bytes;  // of an element; from the first to the end of the last
  const unsigned char* begin;
  std::vector<uint8_t> shadow;  // a byte for each byte; empty: all are owned and written

  explicit Tensor(const NamedTensor& named) : name(named.name), view(named.tensor), role(named.role) {
    item = bytes = kItemBytes[static_cast<int>(view->dtype)];
    for (int d = 0; d < view->ndim; ++d) bytes += (view->sizes[d] - 1) * view->strides[d] * item;
    begin = view->as<unsigned char>();
    const bool unwritten = role == Role::Output || role == Role::Workspace, gaps = bytes > elements(*view) * item;
    const uint8_t state = unwritten ? kOwned : kOwned | kWritten;
    if (unwritten || gaps) shadow.assign(bytes, gaps ? 0 : state);
    if (gaps) each_element([&](size_t offset, int64_t) { memset(&shadow[offset], state, item); });
  }

  // Calls visit(offset in bytes, number) for every element, the last index fastest.
  template <typename F>
  void each_element(F visit) const {
    int64_t index[TensorView::kMaxDims] = {}, offset = 0;
    const int64_t count = elements(*view);
    for (int64_t i = 0; i < count; ++i) {
      visit(offset * item, i);
      for (int d = view->ndim - 1; d >= 0; --d) {
        offset += view->strides[d];
        if (++index[d] < view->sizes[d]) break;
        offset -= view->strides[d] * view->sizes[d];
        index[d] = 0;
      }
    }
  }

  std::string text() const { return std::string(name) + " " + describe(*view); }

  // Empty if this tensor allows the access, else why it does not.
  std::string refuse(size_t at, size_t count, Access kind) {
    const bool writes = kind == Access::Write || kind == Access::Atomic;
    if (writes && role == Role::Input)
      return "writes to " + text() + ", which its Call lists as an input: give it its Role in the launcher";
    if (shadow.empty()) return "";
    for (size_t i = at; i < at + count; ++i) {
      if (!(shadow[i] & kOwned))
        return "out of bounds: between the elements of " + text() + ", at byte " + std::to_string(i);
      if (kind != Access::Write && !(shadow[i] & kWritten))
        return "reads byte " + std::to_string(i) + " of " + text() + ", which nothing has written";
    }
    if (writes) memset(&shadow[at], kOwned | kWritten, count);
    return "";
  }

  // Why this tensor, an output, is not complete; empty if it is.
  std::string unwritten() const {
    int64_t missing = 0, first = 0;
    if (role != Role::Output || !memchr(shadow.data(), kOwned, shadow.size())) return "";
    each_element([&](size_t offset, int64_t i) {
      if (!(shadow[offset] & kWritten) && missing++ == 0) first = i;
    });
    std::string index;
    for (int d = view->ndim - 1; d >= 0; first /= view->sizes[d--])
      index = std::to_string(first % view->sizes[d]) + (index.empty() ? "" : ", ") + index;
    return "output " + text() + " was left unwritten at (" + index + "), " + std::to_string(missing) +
           " elements in all: the kernel's grid or mask misses it";
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
    if (at < tensor.begin || at + bytes > tensor.begin + tensor.bytes) continue;
    const std::string refusal = tensor.refuse(at - tensor.begin, bytes, kind);
    allowed = allowed || refusal.empty();
    if (reason.empty()) reason = refusal;
  }
  if (allowed || !reason.empty()) return allowed ? "" : reason;
  return text("%zu-byte %s out of bounds: %s", bytes, kind == Access::Read ? "read" : "write",
              place(at, bytes).c_str());
}

std::string place(const unsigned char* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) < 65536)
    return text("address %zu: a null pointer, so an absent tensor", reinterpret_cast<size_t>(at));
  const Tensor* nearest = nullptr;
  ptrdiff_t before = 0, past = 0, distance = 1 << 20;
  for (const Tensor& tensor : registry().tensors) {
    const ptrdiff_t ahead = tensor.begin - at, behind = at + bytes - (tensor.begin + tensor.bytes);
    if (std::max({ahead, behind, ptrdiff_t(0)}) >= distance) continue;
    nearest = &tensor, before = ahead, past = behind;
    distance = std::max({ahead, behind, ptrdiff_t(0)});
  }
  if (!nearest)
    return text("address %p, in no tensor of the call (list all that the kernel touches)",
                static_cast<const void*>(at));
  const std::string name = nearest->text();
  if (before > 0) return text("%td bytes before %s", before, name.c_str());
  if (past > 0) return text("up to %td bytes past the end of %s", past, name.c_str());
  return text("byte %td of %s", -before, name.c_str());
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
    for (const auto& tensor : registry.tensors) error = error.empty() ? tensor.unwritten() : error;
  }
  registry = {};
  if (!error.empty()) throw std::runtime_error("cuda_on_cpu: " + std::string(op) + ": " + error);
}

}  // namespace transfuse
