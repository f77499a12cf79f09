"""`step37 quantize`: a BF16 or FP8 release to FP8 or NVFP4, in the release's own layout."""
