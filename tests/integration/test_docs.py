# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows, works."""

import re

import gmem
import numpy as np
import pytest
from helpers import ROOT, run_python


def snippets(name: str) -> str:
    """What is marked ```python gpu runs only where there is one."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))


@pytest.mark.parametrize("name", ["README.md", "docs/user.md"])
def test_snippets_run(name):
    done = run_python(snippets(name))
    assert done.returncode == 0 and done.stdout, done.stderr


def test_the_drivers_pages_driver_keeps_pages(connect, tmp_path, monkeypatch):
    """The example of docs/driver.md as a tier, attached by path: pages go there and back, and home at detach."""
    (tmp_path / "shelf.py").write_text(snippets("docs/driver.md"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    session = connect("simgpu0:capacity=1M")
    session.attach("shelf:Shelf", "shelf0", capacity=8 << 20)
    a = gmem.array(np.random.default_rng(5).integers(0, 255, 4 << 20, dtype=np.uint8), page_size="64K")
    want = a.copy()
    shelf = session.hnid("shelf0")
    gmem.prefetch(a, "shelf0")
    assert (gmem.where(a)["valid"] == 1 << shelf).all()
    assert (a[: 1 << 20] == want[: 1 << 20]).all()
    with gmem.device("simgpu0").context() as context:
        assert context.launch(lambda x: int(x.sum(dtype=np.int64)), a).wait(60) == int(want.sum(dtype=np.int64))
    with pytest.raises(gmem.GmemError, match="colour"):
        session.attach("shelf:Shelf", "other", colour="red")
    with pytest.raises(gmem.NotSupported):
        gmem.device("shelf0").context()
    gmem.prefetch(a, "shelf0")
    session.detach("shelf0")
    assert (gmem.where(a)["valid"] == 1).all() and (a == want).all()
