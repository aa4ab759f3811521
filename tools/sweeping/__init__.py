"""What tools/model_sweep.py needs: small configurations, checks of one class, and the table."""
