"""What this installation and this machine can run, and the remedy for what they cannot.

`inspect` reads facts into a `Report` of plain data and draws the conclusions; `render` shows one.
"""

from jax_moe_ep.doctor.diagnosis import Auto, Problem, Report, inspect
from jax_moe_ep.doctor.facts import Device, Extension, Host
from jax_moe_ep.doctor.view import render

__all__ = ["Auto", "Device", "Extension", "Host", "Problem", "Report", "inspect", "render"]
