"""Where the two import packages have their source roots, and where CUDA sources will be built."""

from setuptools import find_packages, setup

setup(
    packages=find_packages("kernels", include=["step37_kernels*"])
    + find_packages(".", include=["step37_ext*"]),
    package_dir={"step37_kernels": "kernels/step37_kernels", "step37_ext": "step37_ext"},
)
