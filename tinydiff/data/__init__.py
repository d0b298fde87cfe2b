"""Data sets, as host arrays, and the order in which training sees them.

mnist          real digits: 5,000 in the package, all of MNIST, Fashion-MNIST, or the files of a folder
heartbeat      bits with a pulse in every fifth place
toys           points in the plane: moons, spirals, ...; a mixture of Gaussians, exactly known
shapes         random scenes of coloured shapes, drawn
shape_captions what scenes are called, written and understood
captioned      images with captions in one form: shapes, digits, clothes, the images of a folder
audio          notes that the package plays, WAV files, folders of them
spectrum       what they look like: STFT, mel spectrograms, the pitch of a note
loader         batches whose content depends on the seed and the step alone
idx            the file format of MNIST
download       mirrors, checksums and the cache
make_mnist_5k  the script that made mnist_5k.npz, the digits in the package
"""
