"""Models by name, images of any kind, and the preprocessing between them.

Import from the modules: source (load_model, build_model), images (open_images, without_overlap),
preprocess (Preprocess), zoo (build_zoo, seeded_images).
"""
