"""Triton kernels of ddfast and their launches, one file per operator; needs `triton`."""

if __name__ != "ddfast.kernels":
    raise ImportError(
        "this folder is the source of ddfast.kernels; keep the ddfast checkout off sys.path"
    )
