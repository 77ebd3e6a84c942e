"""Reading, comparing and picturing what runs leave behind."""
