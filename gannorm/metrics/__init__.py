"""Sample quality: features of images, distances between sets of them, images pair by pair."""
