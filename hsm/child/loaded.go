package child

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"slices"
	"sync/atomic"

	"github.com/conclave-kms/conclave/hsm"
)

// loaded is a key that was loaded into the device. The child knows it by its number;
// a process that was started since does not, and gets the blob again.
type loaded struct {
	d     *Device
	op    op     // opLoadHMAC or opLoadSigner
	curve byte   // of a signer
	blob  []byte // nil: it cannot be loaded again
	key   uint64

	at       atomic.Pointer[generation] // where it is loaded
	loading  chan struct{}              // capacity 1: one caller at a time loads
	unloaded atomic.Bool
}

type use = func(ctx context.Context, input []byte) ([]byte, error)

func (d *Device) newLoaded(o op, curve byte, blob []byte) *loaded {
	return &loaded{d: d, op: o, curve: curve, blob: bytes.Clone(blob), key: d.keys.Add(1), loading: make(chan struct{}, 1)}
}

// LoadHMAC is hsm.Device.LoadHMAC.
func (d *Device) LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	return d.load(ctx, opLoadHMAC, curveNone, blob)
}

// LoadSigner is hsm.Device.LoadSigner.
func (d *Device) LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	return d.load(ctx, opLoadSigner, curveNumber(c), blob)
}

func (d *Device) load(ctx context.Context, o op, curve byte, blob []byte) (use, func(), error) {
	if err := fits(o, blob); err != nil {
		return nil, nil, err
	}
	k := d.newLoaded(o, curve, blob)
	g, err := d.living(ctx, o)
	if err == nil {
		err = k.ensure(ctx, g)
	}
	if err != nil {
		return nil, nil, err
	}
	return k.use, k.unload, nil
}

// living returns the process that there is.
func (d *Device) living(ctx context.Context, o op) (*generation, error) {
	c := d.state.Load()
	return c.g, c.failure(ctx, o)
}

// ensure loads the key into the process g unless it is there.
func (k *loaded) ensure(ctx context.Context, g *generation) error {
	if k.at.Load() == g {
		return nil
	}
	select {
	case k.loading <- struct{}{}:
		defer func() { <-k.loading }()
	case <-ctx.Done():
		return contextError(opNames[k.op], ctx.Err())
	}
	if k.at.Load() == g {
		return nil
	}
	if k.blob == nil {
		return unavailablef("load: the key went with the PKCS#11 process that generated it: load it from the blob of another device")
	}
	m := request(k.op, k.key, k.blob)
	m.arg = k.curve
	if err := g.call(ctx, m, k.d.timeout, nil); err != nil {
		return err
	}
	k.at.Store(g)
	return nil
}

func (k *loaded) use(ctx context.Context, input []byte) ([]byte, error) {
	if k.unloaded.Load() {
		return nil, invalidf("the key was unloaded: load it again")
	}
	if err := fits(opUse, input); err != nil {
		return nil, err
	}
	g, err := k.d.living(ctx, opUse)
	if err != nil {
		return nil, err
	}
	if err := k.ensure(ctx, g); err != nil {
		return nil, err
	}
	var out []byte
	err = g.call(ctx, request(opUse, k.key, input), k.d.timeout, func(reply message) error {
		if reply.n != 1 {
			return badReply(opUse)
		}
		out = bytes.Clone(reply.parts[0])
		return nil
	})
	return out, err
}

// unload ends the key. The process forgets it; where that cannot be said to it, it
// ends with the process.
func (k *loaded) unload() {
	if k.unloaded.Swap(true) {
		return
	}
	g := k.at.Load()
	if g == nil || k.d.state.Load().g != g {
		return
	}
	_ = g.call(context.Background(), request(opUnload, k.key), k.d.timeout, nil)
}

// GenerateHMAC is hsm.Device.GenerateHMAC.
func (d *Device) GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	blobs, _, k, err := d.generate(ctx, opGenerateHMAC, curveNone, recipients)
	if err != nil {
		return nil, nil, nil, err
	}
	return blobs, k.use, k.unload, nil
}

// GenerateSigner is hsm.Device.GenerateSigner.
func (d *Device) GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	blobs, point, k, err := d.generate(ctx, opGenerateSigner, curveNumber(c), recipients)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	ec := elliptic.P384()
	if c == ecdh.P256() {
		ec = elliptic.P256()
	}
	if public, err = ecdsa.ParseUncompressedPublicKey(ec, point); err != nil {
		k.unload()
		return nil, nil, nil, nil, badReply(opGenerateSigner)
	}
	return blobs, public, k.use, k.unload, nil
}

// generateCalls is how many calls of the library's deadline a generation may take.
const generateCalls = 4

// generate has the key wrapped for this device too, so that it can be loaded again.
func (d *Device) generate(ctx context.Context, o op, curve byte, recipients [][]byte) (blobs [][]byte, public []byte, k *loaded, err error) {
	if len(recipients) > hsm.MaxRecipients {
		return nil, nil, nil, invalidf("generate: %d recipients, at most %d are possible", len(recipients), hsm.MaxRecipients)
	}
	all, own := recipients, slices.IndexFunc(recipients, func(r []byte) bool { return bytes.Equal(r, d.id.importKey) })
	if own < 0 && len(all) > 0 && len(all) < hsm.MaxRecipients {
		own, all = len(all), append(slices.Clone(all), d.id.importKey)
	}
	list := joinList(all)
	if err := fits(o, list); err != nil {
		return nil, nil, nil, err
	}
	g, err := d.living(ctx, o)
	if err != nil {
		return nil, nil, nil, err
	}
	load := opLoadHMAC
	if o == opGenerateSigner {
		load = opLoadSigner
	}
	k = d.newLoaded(load, curve, nil)
	m := request(o, k.key, list)
	m.arg = curve
	err = g.call(ctx, m, generateCalls*d.timeout, func(reply message) error {
		if reply.n != 2 {
			return badReply(o)
		}
		got, err := splitList(bytes.Clone(reply.parts[0]))
		if err != nil || len(got) != len(all) {
			return badReply(o)
		}
		blobs, public = got, bytes.Clone(reply.parts[1])
		return nil
	})
	if err != nil {
		return nil, nil, nil, err
	}
	if own >= 0 {
		k.blob = blobs[own]
	}
	k.at.Store(g)
	return blobs[:len(recipients):len(recipients)], public, k, nil
}
