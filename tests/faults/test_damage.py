"""Edited outputs are refused; lost ones are made again."""

import pytest
from fault_injection import WITHOUT_SCORES, copy_without, same_as, same_scores, start

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("output", ["data/iter0_*_True.json", "models/iter_1_*/adapter_model.safetensors"])
def test_an_output_with_an_altered_byte_stops_the_run_with_its_name(output, llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    run = copy_without(undisturbed, tmp_path)
    file = next(run.glob(output))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    status, loop = start({**settings, **WITHOUT_SCORES}, tmp_path)
    assert status != 0 and f"{file} is not the file" in loop and "Traceback" not in loop, loop[-3000:]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_lost_outputs_are_made_again(llama_run, tmp_path):
    undisturbed, settings, _ = llama_run
    run = copy_without(undisturbed, tmp_path)
    lost = [*run.glob("data/iter1_*_True.json"), *run.glob("models/iter_2_*/adapter_model.safetensors")]
    lost.append(run / "results" / "iter_1" / "grath_mc2.json")
    assert len(lost) == 3
    for path in lost:
        path.unlink()
    status, output = start(settings, tmp_path)
    assert status == 0, output[-3000:]
    same_as(run, undisturbed)
    same_scores(run, undisturbed)
