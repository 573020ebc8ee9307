"""Benchmarks of every operator and method: one file each, with `cases` and `sized`."""

if __name__ != "ddfast.benchmarks":
    raise ImportError(
        "this folder is the source of ddfast.benchmarks; keep the ddfast checkout off sys.path"
    )
