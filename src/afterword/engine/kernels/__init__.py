"""The C++ kernels. `hatch_build.py` compiles each `x.cpp` to `libx.so`."""
