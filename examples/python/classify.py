"""The classes of images, by a bundle: python classify.py BUNDLE IMAGE..."""

import sys

import quartermap_deploy as qm

bundle = qm.load_bundle(sys.argv[1])  # checks the hash of every file
for found in bundle.predict(sys.argv[2:]):
    print(found.source)
    for score in found.scores:
        print(f"  {score.probability:.6f}  {score.label}")
