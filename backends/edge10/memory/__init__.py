"""Where everything lies in DRAM and on chip."""
