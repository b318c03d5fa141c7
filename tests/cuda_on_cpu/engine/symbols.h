// What the module's own symbol table tells: names of kernels, and where the __shared__ variables lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cuda_on_cpu {

struct Symbol {
  uintptr_t begin;
  size_t size;
  std::string name, mangled;
  bool visible;  // of the kernel that is running
  uintptr_t end() const { return begin + size; }
};

const std::vector<Symbol>& shared_symbols();       // by address
const Symbol* shared_symbol(const void* address);  // the variable that this address is in, or nullptr
void show_shared_symbols_of(const void* kernel);
bool in_this_module(const void* address);  // code and data of this shared object

}  // namespace cuda_on_cpu
