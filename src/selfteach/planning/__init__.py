"""How long a step would take on devices that are not here: arithmetic, then a simulation.

`devices` knows the devices, `work` what a step is made of, `costs` what one device takes for it,
`calibration` corrects that by what was measured, `pipeline` lets samplers, critics and trainers work
side by side, `layout` shares devices out, `forecast` puts it together and `telling` says it.
"""
