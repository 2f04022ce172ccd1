"""The pure parts import without vLLM, Ray and DeepSpeed, so that they also run on a bare GPU machine.

Checks imports only, in a process where the three cannot be imported.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PURE = (
    "rollout.decoding",
    "rollout.group_decoder",
    "rollout.reference_engine",
    "rollout.settings",
    "rollout.probe",
    "rollout.violations",
    "reward.checkpoint_correlation",
    "reward.cooccurrence",
    "reward.exposure",
    "reward.metrics",
    "reward.pairwise",
    "reward.rules",
    "reward.sasrec",
    "reward.scoring",
    "reward.stratified",
    "trainer.advantage",
    "trainer.aggregation",
    "trainer.losses",
    "trainer.objective",
    "trainer.policy",
    "trainer.popularity_bias",
    "trainer.ranker_training",
    "trainer.row_scores",
    "trainer.tree_attention",
    "trainer.trees",
    "trainer.jobs",
    "launch.config",
    "launch.doctor",
)
SCRIPT = """
import importlib, sys

# An entry of None makes an import fail and `find_spec` find nothing, which is how an absent package looks.
sys.modules.update(dict.fromkeys(("vllm", "ray", "deepspeed")))
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_pure_parts_import_alone() -> None:
    data = [f"data.{path.stem}" for path in sorted((ROOT / "data").glob("*.py")) if path.stem != "__init__"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *data, *PURE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
