"""Plots of runs: their metrics (`runs`), what is shown (`panels`, `tables`), and how (`figure`, `page`)."""
