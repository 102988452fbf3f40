"""The decode modes of the service, measured beside each other on the bundled model."""

from aquifer.server.settings import Settings
from aquifer.workloads.modes import MODES, ModesPlan, compare_modes


def test_exact_modes_are_found_identical_and_hold_less_of_the_device() -> None:
    plan = ModesPlan(("text2json", "needles"), tokens=1200, samples=1, new_tokens=12, batch=2)
    steps: list[str] = []
    results = compare_modes(
        plan,
        Settings(device="cpu", ram_bytes=1 << 28, gpu_kv_bytes=1 << 28, selective_ram_bytes=1 << 28),
        lambda what, done, total: steps.append(what),
    )
    by_mode = {result.mode: result for result in results}
    assert tuple(by_mode) == MODES
    assert steps[0] == "storing" and set(MODES) < set(steps)
    for mode in ("resident", "streamed", "verified"):
        assert (by_mode[mode].identical, by_mode[mode].prompts) == (2, 2)
        assert by_mode[mode].generated_tokens == 24
    memory = {mode: by_mode[mode].device_bytes_per_token["resident"] for mode in MODES}
    assert memory["streamed"] < memory["selective"] < memory["resident"]
    assert by_mode["verified"].accepted is not None and 0 <= by_mode["verified"].accepted <= 1
    assert by_mode["streamed"].checks_per_token is None
