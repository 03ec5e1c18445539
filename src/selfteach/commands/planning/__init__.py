"""Predict step time and memory on devices that are not here: arithmetic, then a simulation.

`devices` describes hardware, `workload` what a step consists of, `costs` how long one device takes;
`calibration` fits these costs to measured steps, `pipeline` and `simulation` run samplers, critics and
trainers concurrently, `layout` assigns devices to roles, `estimate` searches for the best layout, and
`describe_plan` prints it. The simulation needs SimPy: ``pip install "selfteach[plan]"``.
"""
