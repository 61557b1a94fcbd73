"""The dies of one model in several processes, on one machine or several."""
