"""What ``scripts/gpu_check.sh --engine`` is made of; see ``scripts/gpu_engine.py``."""
