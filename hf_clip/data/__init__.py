"""Reading data sets: what a user names becomes a table or stream of `datasets`, with its columns and images found."""
