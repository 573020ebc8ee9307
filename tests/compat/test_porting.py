"""docs/porting.md: its scripts, with plain torch as their `utils` and with ddfast, by one line."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "porting.md").read_text()
DC, DM, MTT, UNROLL = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.S | re.M)
IMPORT = re.compile(r"^from ddfast\.compat\.\w+ import", flags=re.M)


@pytest.fixture
def plain_utils(monkeypatch) -> None:
    place = Path(__file__).with_name("plain_utils.py")
    spec = importlib.util.spec_from_file_location("plain_utils", place)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_utils", module)
    spec.loader.exec_module(module)


def run(script: str) -> dict:
    torch.set_num_threads(1)
    names = {"__name__": "script"}
    exec(script, names)
    return names


@pytest.mark.uses_global_random_state
@pytest.mark.parametrize("script", [DC, DM, MTT], ids=["DC", "DM", "MTT"])
def test_one_import_line_and_the_same_losses(script, plain_utils) -> None:
    plain, changed = IMPORT.subn("from plain_utils import", script)
    assert changed == 1 and "ddfast" not in plain.replace("ddfast's", "")
    official, ours = run(plain), run(script)
    assert len(ours["losses"]) >= 3 and len(set(ours["losses"])) == len(ours["losses"])
    assert ours["losses"] == pytest.approx(official["losses"], rel=2e-4)
    moved = (ours["image_syn"] - official["image_syn"]).abs().max()
    assert moved < 1e-3 * official["image_syn"].abs().max()
    if script == MTT:
        torch.testing.assert_close(ours["syn_lr"], official["syn_lr"], rtol=1e-4, atol=0)


@pytest.mark.uses_global_random_state
def test_unroll_in_place_of_the_loop() -> None:
    run(MTT + UNROLL)  # which compares


def test_every_name_of_the_page_is_there() -> None:
    from ddfast.compat import dc, idc, mtt

    table = PAGE.split("| name | what is behind it |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row)}
    there = {*dc.__all__, *idc.__all__, *mtt.__all__}
    assert named <= there
    assert there - named == {"add_loss", "remove_aug"}
    for module in (dc, idc, mtt):
        for name in module.__all__:
            assert callable(getattr(module, name))
