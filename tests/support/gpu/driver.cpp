// The part of CUDA's driver that porter/run/cuda.py calls, over this machine's memory. A module is a library of this
// CPU's code, its image the path. Behind each buffer lies memory that may not be touched.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>

struct Place { unsigned x, y, z; };
using Kernel = void (*)(void**, Place, Place);
constexpr int INVALID = 1, NOT_FOUND = 500;
constexpr size_t PAGE = 4096;
static std::unordered_map<uint64_t, std::pair<void*, size_t>> held;

static bool within(uint64_t address, size_t size) {
  for (auto& [start, mapped] : held)
    if (start <= address && address + size <= reinterpret_cast<uint64_t>(mapped.first) + mapped.second - PAGE) return true;
  return false;
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { return *device = 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = nullptr, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
int cuDeviceGetName(char* name, int size, int) { return strncpy(name, "emulated", size), 0; }

int cuMemAlloc_v2(uint64_t* address, size_t size) {
  if (!size) return INVALID;
  size_t whole = (size + PAGE - 1) / PAGE * PAGE + PAGE;
  void* start = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + whole - PAGE, PAGE, PROT_NONE)) return 2;
  *address = reinterpret_cast<uint64_t>(start) + whole - PAGE - (size + 3) / 4 * 4;
  memset(reinterpret_cast<void*>(*address), 0xa5, size);
  held[*address] = {start, whole};
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  auto found = held.find(address);
  if (found == held.end()) return INVALID;
  munmap(found->second.first, found->second.second);
  held.erase(found);
  return 0;
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  return within(to, size) ? (memcpy(reinterpret_cast<void*>(to), from, size), 0) : INVALID;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  return within(from, size) ? (memcpy(to, reinterpret_cast<void*>(from), size), 0) : INVALID;
}

int cuModuleLoadData(void** module, const char* path) {
  return (*module = dlopen(path, RTLD_NOW | RTLD_LOCAL)) ? 0 : INVALID;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return (*function = dlsym(module, (std::string("launch_") + name).c_str())) ? 0 : NOT_FOUND;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned, void*, void** given, void**) {
  if (!gx || !gy || !gz || gy > 65535 || gz > 65535 || bx * by * bz == 0 || bx * by * bz > 1024) return INVALID;
  reinterpret_cast<Kernel>(function)(given, {gx, gy, gz}, {bx, by, bz});
  return 0;
}
}
