"""What a method keeps beside the networks is told before it fills the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mdistill.engine import build
from mdistill.errors import UserError

from .. import runs
from ..distillers import examples

CUDA = torch.device("cuda")
KEPT = "MCLD keeps 0.0 GB beside the networks, most of it queue.keys (70, 10) in float32"


def test_a_run_says_how_much_a_method_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = runs.write_config(tmp_path, "mcld", distiller={"queue_size": 70})
    assert runs.experiment(cfg).metadata["notes"] == []
    monkeypatch.setattr(build, "LARGE_STATE", 70 * 10 * 4)  # its keys alone
    assert runs.experiment(cfg).metadata["notes"] == [f"distiller: {KEPT}; a checkpoint holds it too"]
    assert "for each of 2 trials" in runs.experiment(cfg, seeds=(0, 1)).metadata["notes"][0]


@pytest.mark.parametrize("name", ["mcld", "ps_kd"])
def test_what_the_device_has_no_room_for_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of ImageNet, without values: 1,281,167 samples of 1,000 classes."""
    changes = {"queue_size": None} if name == "mcld" else {}
    gigabytes = {"mcld": 5.134, "ps_kd": 2.562}[name]
    with torch.device("meta"):
        data = examples.data_info(num_classes=1000, num_samples=1_281_167)
        method = examples.DISTILLERS.get(name)
        teacher = examples.network(1, 1000) if name == "mcld" else None
        settings = {**examples.SETTINGS[name], **changes}
        distiller = method(examples.network(0, 1000), teacher, data, **settings)

    def free(gigabytes: float) -> Callable[[torch.device], tuple[int, int]]:
        return lambda device: (int(gigabytes * 1e9), 10**12)

    monkeypatch.setattr(torch.cuda, "mem_get_info", free(gigabytes + 0.1))
    assert f"{gigabytes:.1f} GB" in str(build.large_state([distiller], CUDA))
    with pytest.raises(UserError, match=rf"keeps {gigabytes:.1f} GB .*for each of 2 trials.*; cuda has [^\n]*free"):
        build.large_state([distiller, distiller], CUDA)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free(1.0))
    with pytest.raises(UserError, match=r"^distiller: [^\n]*; cuda has 1\.0 GB free\. Choose settings that keep less"):
        build.large_state([distiller], CUDA)
