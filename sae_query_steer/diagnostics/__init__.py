"""Will it steer? What a site tells of the classes, and what it passes on."""
