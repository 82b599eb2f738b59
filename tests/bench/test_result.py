"""What a measurement took minutes to find must still be there when somebody looks at it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mess_compile.bench import result
from mess_compile.bench.run import Bench, CheckedPromise, Column, NearCut
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.archive import open_archive
from tests import small_network


class TestWhatBenchKeeps:
    def found(self) -> Bench:
        columns = [Column(60.0 + i, 1.5 + i, 0.25, rates) for i, rates in enumerate([(1.0,), *[(0.75, 0.25)] * 3])]
        return Bench(
            *("street", "host", "test", 8, 0, 3, "baseline", columns[0], (), columns[1], columns[2], columns[3]),
            latency_ratio=2.5,
            latency_ratio_range=(2.25, 2.75),
            workload_ratio=3.0,
            miou_difference=-0.5,
            p95_ms=4.5,
            disagreements=(NearCut("a", 1, 2, 0),),
            promises=(CheckedPromise("err_pp", 2.0, 2.91, False),),
            doubts=("host was unstable",),
        )

    def test_is_read_back_with_the_plan_it_was_of(self, tmp_path: Path) -> None:
        small_network.write_bundle(tmp_path / "street.mess")
        opened = open_archive(tmp_path / "street.mess")
        opened.close()
        result.write_bench(tmp_path / "bench" / "host.json", self.found(), opened.manifest.plans[0])
        kept = result.read_bench(tmp_path / "bench" / "host.json")
        assert (kept.found.split, kept.found.images, kept.found.passes, len(kept.found.disagreements)) == (
            "test",
            8,
            3,
            1,
        )
        assert [column.latency_ms for column in kept.columns.values()] == [1.5, 2.5, 3.5, 4.5]
        assert kept.columns["measured"].exit_rates == (0.75, 0.25)
        assert kept.found.latency_ratio_range == (2.25, 2.75)
        assert kept.found.doubts == ("host was unstable",)
        assert kept.found.missed == (CheckedPromise("err_pp", 2.0, 2.91, False),)
        assert (kept.heads, kept.cuts) == (small_network.HEADS, (18, None))

    def test_is_refused_when_it_is_damaged(self, tmp_path: Path) -> None:
        path = tmp_path / "host.json"
        path.write_text('{"format": "mess-bench", "version": 3, "bench": {"split": 3}}')
        with pytest.raises(InputError, match=r"damaged.*bench BUNDLE --data DIR"):
            result.read_bench(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: content["stages"][0].update(cut="18"), "stages[0].cut is '18', not an integer"),
            (lambda content: content["bench"]["measured"].update(miou="good"), "bench.measured.miou is 'good', not a"),
            (lambda content: content["bench"].pop("split"), "bench.split is missing"),
            (lambda content: content.update(stage=[]), "stage is not a known entry (did you mean 'stages'?)"),
        ],
    )
    def test_a_wrong_entry_is_named_with_its_value(
        self, tmp_path: Path, change: Callable[[Any], None], message: str
    ) -> None:
        small_network.write_bundle(tmp_path / "street.mess")
        opened = open_archive(tmp_path / "street.mess")
        opened.close()
        path = tmp_path / "host.json"
        result.write_bench(path, self.found(), opened.manifest.plans[0])
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=re.escape(f"host.json is damaged ({message}")):
            result.read_bench(path)
