"""`mythos gpu-check`: what only a GPU can show, measured in one go, each check against what is expected of it.

`catalog` lists the checks, `runner` runs them stage by stage in processes of their own, `stage` is such a process,
`report` writes what came out. All other modules are the checks themselves. `catalog`, `runner` and `report` do not
import torch: whatever is broken, the report gets written.
"""
