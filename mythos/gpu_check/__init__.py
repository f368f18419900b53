"""`mythos gpu-check`: measure in one go what only a GPU can show, and compare each figure with its expected value.

`catalog` lists the checks, `runner` runs them stage by stage in separate processes, `stage` is such a process, and
`report` writes the results. The other modules are the checks themselves. `catalog`, `runner` and `report` do not import
torch, so that the report is written even if torch is broken.
"""
