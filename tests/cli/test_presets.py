from mythos.cli.presets import preset_table
from mythos.config.presets import PRESETS, preset_config


def test_table_has_an_aligned_line_for_every_preset() -> None:
    header, *lines = preset_table().splitlines()
    rows = {line.split()[0]: line for line in lines[: len(PRESETS)]}
    assert list(rows) == list(PRESETS)
    total, dim = header.index("total"), header.index("dim")
    assert rows["mythos_1b"][total:].split()[0] == "1.07B"
    assert rows["looped_140m"][total:].split()[0] == "149M"
    assert rows["mythos_nano"][total:].split()[0] == "1.14M"
    for name, row in rows.items():
        assert int(row[dim:].split()[0]) == preset_config(name).dim
