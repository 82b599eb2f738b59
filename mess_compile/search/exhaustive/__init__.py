"""Every plan, evaluated exactly."""
