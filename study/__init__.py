"""The study: every variant tuned, trained, evaluated and kept. python -m study"""
