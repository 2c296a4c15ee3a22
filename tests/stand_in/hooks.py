"""What a CPU build of torch lacks to hold tensors that say they are on cuda: a guard and hooks, which do nothing."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
};
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device first() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, first()); }
  Device exchangeDevice(Device) const override { return first(); }
  Device getDevice() const override { return first(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int = 0) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
static Guard guard;
extern "C" void register_guard() {
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
"""


def register(folder: Path) -> None:
    """Compile the hooks and load them; in a process that has not imported torch, which looks for them once.

    Args:
        folder: where the library is written.
    """
    assert "torch" not in sys.modules, "the hooks come before torch"
    home = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]
    (folder / "hooks.cpp").write_text(SOURCE)
    paths = [f"-I{home}/include", f"-L{home}/lib"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "hooks.cpp", *paths, "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", "hooks.so"], cwd=folder, check=True)
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(home / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "hooks.so"), ctypes.RTLD_GLOBAL).register_guard()
