"""Parametrisations of the synthetic set, and its picture."""

from __future__ import annotations

from ddfast.synthetic.decoding import check_decoder, decode, labelled, repeats
from ddfast.synthetic.picture import grid, write_png
from ddfast.synthetic.pixels import pixels

__all__ = ["check_decoder", "decode", "grid", "labelled", "pixels", "repeats", "write_png"]
