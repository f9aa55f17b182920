"""Training runs: settings are checked, the run is prepared and started, and Composer's Trainer fits the model."""
