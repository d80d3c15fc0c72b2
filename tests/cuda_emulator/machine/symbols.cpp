// Names of kernels, for messages and records. Kernels are local to their file, unknown to the dynamic linker: the
// name is looked up in the symbol table of the program, or of the shared library, that holds the function.
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "machine/machine.h"

namespace emulator {

namespace {

// A file in memory; empty where it cannot be read.
class MappedFile {
 public:
  explicit MappedFile(const char* path) {
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about{};
    if (descriptor >= 0 && fstat(descriptor, &about) == 0 && about.st_size > 0) {
      void* bytes = mmap(nullptr, static_cast<size_t>(about.st_size), PROT_READ, MAP_PRIVATE, descriptor, 0);
      if (bytes != MAP_FAILED) {
        bytes_ = static_cast<const char*>(bytes);
        size_ = static_cast<size_t>(about.st_size);
      }
    }
    if (descriptor >= 0) close(descriptor);
  }
  ~MappedFile() {
    if (bytes_ != nullptr) munmap(const_cast<char*>(bytes_), size_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // `count` of T at an offset, or nullptr where the file is shorter
  template <class T>
  const T* at(size_t offset, size_t count = 1) const {
    return offset + count * sizeof(T) <= size_ ? reinterpret_cast<const T*>(bytes_ + offset) : nullptr;
  }

 private:
  const char* bytes_ = nullptr;
  size_t size_ = 0;
};

// The symbol of `file` at this address, as the linker wrote it; empty where there is none.
std::string symbol_at(const MappedFile& file, uint64_t address) {
  const auto* header = file.at<ElfW(Ehdr)>(0);
  if (header == nullptr || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return {};
  const auto* sections = file.at<ElfW(Shdr)>(header->e_shoff, header->e_shnum);
  for (int s = 0; sections != nullptr && s < header->e_shnum; ++s) {
    const ElfW(Shdr) & table = sections[s];
    if (table.sh_type != SHT_SYMTAB || table.sh_link >= header->e_shnum) continue;
    const size_t count = table.sh_size / sizeof(ElfW(Sym));
    const auto* symbols = file.at<ElfW(Sym)>(table.sh_offset, count);
    for (size_t i = 0; symbols != nullptr && i < count; ++i) {
      if ((symbols[i].st_info & 15) != STT_FUNC || symbols[i].st_value != address) continue;
      const char* name = file.at<char>(sections[table.sh_link].sh_offset + symbols[i].st_name);
      if (name != nullptr) return name;
    }
  }
  return {};
}

std::string demangled(const std::string& symbol) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> plain(
      abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), &std::free);
  std::string name = plain != nullptr ? plain.get() : symbol;
  // "void pycompress::(anonymous namespace)::rows<float, 4>(Params)": what is before the parameters, after the scopes
  int depth = 0;
  size_t end = name.size(), start = 0;
  for (size_t i = name.size(); i-- > 0;) {
    const char c = name[i];
    depth += c == ')' || c == '>' ? 1 : c == '(' || c == '<' ? -1 : 0;
    if (depth == 0 && c == '(' && end == name.size()) end = i;
    if (depth == 0 && i < end && (c == ':' || c == ' ')) {
      start = i + 1;
      break;
    }
  }
  return name.substr(start, end - start);
}

}  // namespace

std::string kernel_name(const void* function) {
  static std::map<const void*, std::string> known;
  const auto found = known.find(function);
  if (found != known.end()) return found->second;
  Dl_info info{};
  link_map* map = nullptr;
  std::string symbol;
  if (dladdr1(function, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) != 0) {
    const bool is_program = map->l_name[0] == '\0';
    const MappedFile file(is_program ? "/proc/self/exe" : info.dli_fname);
    symbol = symbol_at(file, reinterpret_cast<uint64_t>(function) - map->l_addr);
  }
  return known[function] = symbol.empty() ? "?" : demangled(symbol);
}

}  // namespace emulator
