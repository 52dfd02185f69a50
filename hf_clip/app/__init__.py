"""A page in the browser for one model: classify images, search an index, and look inside an image."""
