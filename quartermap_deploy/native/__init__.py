"""Native code: the TensorRT plugin and the CUDA kernels below it, built, checked, and called from PyTorch.

The C++ sources lie in `plugins/` of the repository, and in `quartermap_deploy/_plugins` of an installed wheel. Nothing
here is imported by the rest of the package before it is asked for.
"""

from __future__ import annotations
