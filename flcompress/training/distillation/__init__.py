"""Distillation into few-step students: roles, teacher, simulation and the samples they are judged by."""
