"""A check that takes longer than the time limit."""

from mythos.gpu_check.catalog import Check, Stage, Task

STAGES = (Stage("one", 1, (Task((Check("a", "b"), Check("c", "d")), "tests.gpu_check.faulty:hangs", {}, 100.0),)),)
