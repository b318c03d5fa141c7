#include "symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>

#include "block.h"

namespace cuda_on_cpu {
namespace {

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&free)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), free);
  return status == 0 ? text.get() : name;
}

// "transfuse::norm::layer_norm_row<float>(Params)::sum_smem" -> "sum_smem"
std::string last_part(const std::string& name) {
  return name.substr(name.rfind("::") == std::string::npos ? 0 : name.rfind("::") + 2);
}

struct Module {
  uintptr_t base = 0, begin = 0, end = 0;
  std::string file;
  std::vector<Symbol> shared;
  std::vector<std::pair<uintptr_t, std::string>> functions;

  Module() {
    Dl_info here{};
    dladdr(reinterpret_cast<void*>(&shared_symbols), &here);
    file = here.dli_fname;
    base = reinterpret_cast<uintptr_t>(here.dli_fbase);
    std::ifstream stream(file, std::ios::binary);
    const std::vector<char> image((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    read(image.data());
  }

  void read(const char* image) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* segments = reinterpret_cast<const Elf64_Phdr*>(image + header->e_phoff);
    begin = base;
    for (int i = 0; i < header->e_phnum; ++i) {
      if (segments[i].p_type == PT_LOAD)
        end = std::max<uintptr_t>(end, base + segments[i].p_vaddr + segments[i].p_memsz);
    }
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = image + sections[sections[i].sh_link].sh_offset;
      const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image + sections[i].sh_offset);
      for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s)
        add(symbols[s], names + symbols[s].st_name, sections);
    }
    std::sort(shared.begin(), shared.end(), [](const Symbol& a, const Symbol& b) { return a.begin < b.begin; });
  }

  // A __shared__ variable is a function's static variable (_ZZ...) without an initial value: in .bss.
  void add(const Elf64_Sym& symbol, const char* name, const Elf64_Shdr* sections) {
    if (symbol.st_shndx == SHN_UNDEF || symbol.st_shndx >= SHN_LORESERVE) return;
    const int type = ELF64_ST_TYPE(symbol.st_info);
    if (type == STT_FUNC) functions.emplace_back(base + symbol.st_value, name);
    if (type == STT_OBJECT && strncmp(name, "_ZZ", 3) == 0 && sections[symbol.st_shndx].sh_type == SHT_NOBITS) {
      shared.push_back({base + symbol.st_value, symbol.st_size, last_part(demangled(name)), name, false});
    }
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
  return after != all.begin() && at < (after - 1)->end() ? &*(after - 1) : nullptr;
}

// The variable `name` of the kernel _Z<kernel> has the symbol _ZZ<kernel>E<name>.
void show_shared_symbols_of(const void* kernel) {
  static const void* shown = nullptr;
  if (kernel == shown) return;
  shown = kernel;
  std::string prefix = "_ZZ";
  for (const auto& [address, name] : module().functions) {
    if (address == reinterpret_cast<uintptr_t>(kernel)) prefix += name.substr(2) + "E";
  }
  for (Symbol& symbol : module().shared) symbol.visible = symbol.mangled.compare(0, prefix.size(), prefix) == 0;
}

bool in_this_module(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  return at >= module().begin && at < module().end;
}

std::string function_name(const void* function) {
  for (const auto& [address, name] : module().functions) {
    if (address != reinterpret_cast<uintptr_t>(function)) continue;
    const std::string full = demangled(name.c_str());
    const size_t begin = full.compare(0, 5, "void ") == 0 ? 5 : 0;  // templates show their return type
    std::string bare = full.substr(begin, full.rfind('(') - begin);
    const std::string unnamed = "(anonymous namespace)::";
    for (size_t at; (at = bare.find(unnamed)) != std::string::npos;) bare.erase(at, unnamed.size());
    return bare;
  }
  return "a kernel";
}

std::string source_of(const void* instruction) {
  if (!instruction) return "";
  char command[1024];
  snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%zx 2>/dev/null", module().file.c_str(),
           static_cast<size_t>(reinterpret_cast<uintptr_t>(instruction) - 1 - module().base));
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  std::string places;
  char line[1024];
  while (fgets(line, sizeof(line), pipe)) {
    line[strcspn(line, " \n")] = 0;  // also what follows about discriminators
    if (strchr(line, '?') || strstr(line, "/include/")) continue;
    places += (places.empty() ? " [" : " < ") + base_name(line);
  }
  pclose(pipe);
  return places.empty() ? "" : places + "]";
}

}  // namespace cuda_on_cpu
