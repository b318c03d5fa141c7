#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

#include "internal.h"

namespace cuda_on_cpu {
namespace {

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string readable = status == 0 ? text : name;
  free(text);
  return readable;
}

struct Module {
  uintptr_t base, end = 0;
  std::string file;
  std::vector<Symbol> shared;
  std::map<uintptr_t, std::string> functions;

  Module() {
    Dl_info here{};
    dladdr(reinterpret_cast<void*>(&shared_symbols), &here);
    file = here.dli_fname;
    base = reinterpret_cast<uintptr_t>(here.dli_fbase);
    std::ifstream stream(file, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    const char* image = bytes.data();
    const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* segments = reinterpret_cast<const Elf64_Phdr*>(image + header.e_phoff);
    for (int i = 0; i < header.e_phnum; ++i) {
      if (segments[i].p_type == PT_LOAD) end = std::max(end, base + segments[i].p_vaddr + segments[i].p_memsz);
    }
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
    for (int i = 0; i < header.e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = image + sections[sections[i].sh_link].sh_offset;
      const auto* symbol = reinterpret_cast<const Elf64_Sym*>(image + sections[i].sh_offset);
      for (size_t n = sections[i].sh_size / sizeof(Elf64_Sym); n; --n, ++symbol)
        add(*symbol, names + symbol->st_name, sections);
    }
    std::sort(shared.begin(), shared.end(), [](const Symbol& a, const Symbol& b) { return a.begin < b.begin; });
  }

  // A __shared__ variable is a function's static variable (_ZZ...) without an initial value: in .bss.
  void add(const Elf64_Sym& symbol, const std::string& name, const Elf64_Shdr* sections) {
    if (symbol.st_shndx == SHN_UNDEF || symbol.st_shndx >= SHN_LORESERVE) return;
    const int type = ELF64_ST_TYPE(symbol.st_info);
    const uintptr_t at = base + symbol.st_value;
    if (type == STT_FUNC) functions.emplace(at, name);
    if (type != STT_OBJECT || name.compare(0, 3, "_ZZ") != 0 || sections[symbol.st_shndx].sh_type != SHT_NOBITS) return;
    const std::string readable = demangled(name);  // "transfuse::norm::layer_norm_row<float>(Params)::sum_smem"
    shared.push_back({at, at + symbol.st_size, readable.substr(readable.rfind(':') + 1), name, false});
  }

  std::string function(const void* address) const {
    const auto found = functions.find(reinterpret_cast<uintptr_t>(address));
    return found == functions.end() ? "a kernel" : found->second;
  }
};

Module& module() {
  static Module mine;
  return mine;
}

}  // namespace

const std::vector<Symbol>& shared_symbols() { return module().shared; }

const Symbol* shared_symbol(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  static const auto& all = module().shared;
  auto after = std::upper_bound(all.begin(), all.end(), at, [](uintptr_t a, const Symbol& s) { return a < s.begin; });
  return after != all.begin() && at < (after - 1)->end ? &*(after - 1) : nullptr;
}

// The variable `name` of the kernel _Z<kernel> has the symbol _ZZ<kernel>E<name>.
void show_shared_symbols_of(const void* kernel) {
  static const void* shown = nullptr;
  if (kernel == shown) return;
  shown = kernel;
  const std::string prefix = "_ZZ" + module().function(kernel).substr(2) + "E";
  for (Symbol& symbol : module().shared) symbol.visible = symbol.mangled.compare(0, prefix.size(), prefix) == 0;
}

bool in_this_module(const void* address) {
  static const Module& mine = module();
  const auto at = reinterpret_cast<uintptr_t>(address);
  return at >= mine.base && at < mine.end;
}

std::string function_name(const void* function) {
  std::string name = demangled(module().function(function));
  name = name.substr(0, name.rfind('('));
  for (const char* noise : {"void ", "(anonymous namespace)::"}) {  // templates show their return type
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, strlen(noise));
  }
  return name;
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string source_of(const void* instruction) {
  if (!instruction) return "";
  const size_t offset = reinterpret_cast<uintptr_t>(instruction) - 1 - module().base;
  FILE* pipe = popen(text("addr2line -i -e '%s' 0x%zx 2>/dev/null", module().file.c_str(), offset).c_str(), "r");
  if (!pipe) return "";
  std::string places;
  char line[1024];
  while (fgets(line, sizeof(line), pipe)) {
    line[strcspn(line, " \n")] = 0;  // also what follows about discriminators
    if (!strchr(line, '?') && !strstr(line, "/include/")) places += (places.empty() ? " [" : " < ") + base_name(line);
  }
  pclose(pipe);
  return places.empty() ? "" : places + "]";
}

}  // namespace cuda_on_cpu
