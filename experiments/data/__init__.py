"""Tasks and the Grain pipeline that feeds them."""
