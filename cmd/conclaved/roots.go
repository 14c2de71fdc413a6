package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/tpm"
)

// heldRoot is a hardware root whose device is open.
type heldRoot struct {
	table  string // of the configuration, where its device stands
	cfg    Config // whose Device is this root's
	dev    device
	root   *keyring.Root
	file   rootFile
	public []byte // of the signing key, SEC1 uncompressed
}

func (h *heldRoot) close() error {
	if h == nil {
		return nil
	}
	return h.dev.Close()
}

// heldRoots are the roots of a node. present is nil while the device of the present
// one is dead and the node waits to adopt the next. They outlive a restart of the
// node's parts, because some secrets can be read but once.
type heldRoots struct {
	present, next *heldRoot
	adopted       bool // next is the node's own now
}

func (r *heldRoots) close() error { return errors.Join(r.present.close(), r.next.close()) }

// follow makes an adopted next root the present one. Nothing runs on the former any
// more.
func (r *heldRoots) follow(log *slog.Logger) {
	if !r.adopted {
		return
	}
	if err := r.present.close(); err != nil {
		log.Warn("the former device does not close", "err", err)
	}
	*r = heldRoots{present: r.next}
}

// own is the root that the node's parts run on.
func (r *heldRoots) own() *heldRoot {
	if r.present == nil {
		return r.next
	}
	return r.present
}

// section is a table of the configuration that names a device.
type section struct {
	name string
	cfg  Config
}

func sections(cfg Config) []section {
	list := []section{{"device", cfg}}
	list[0].cfg.NextDevice = nil
	if cfg.NextDevice != nil {
		list = append(list, section{"next_device", cfg.onNext()})
	}
	return list
}

// openRoots finds the device that root.json belongs to, in whichever table of the
// configuration it stands. Where that device cannot be opened but the one of
// next-root.json can, the node is to wait on that one.
func openRoots(ctx context.Context, cfg Config, log *slog.Logger) (*heldRoots, error) {
	file, err := readPresentRoot(cfg)
	if err != nil {
		return nil, err
	}
	nextFile, err := readRoot(nextRootPath(cfg.DataDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	held := &heldRoots{}
	var why []error
	for _, s := range sections(cfg) {
		h, err := openSection(ctx, s, file, nextFile)
		switch {
		case err != nil:
			why = append(why, fmt.Errorf("[%s]: %w", s.name, err))
			continue
		case h.file.Signing == file.Signing:
			held.present = h
		default:
			held.next = h
		}
		if held.present != nil {
			if s.name != "device" {
				log.Warn("root.json belongs to [next_device]: make it the [device] of the configuration", "root", file.Root, "signing_key", file.Signing)
			}
			return held, nil
		}
	}
	// A refused PIN is not a dead device: who corrects it has the node back at once.
	if err := errors.Join(why...); held.next == nil || pinRefused(err) {
		if err != nil && !pinRefused(err) {
			err = fmt.Errorf("%w; if the device is gone for good, another takes its place: conclaved rekey --help", err)
		}
		return nil, errors.Join(err, held.close())
	}
	if len(why) == 0 {
		why = append(why, errors.New("no table of the configuration names it"))
	}
	log.Warn("the device of root.json cannot be had: the node waits on the next device, without serving, until it is adopted",
		"root", file.Root, "signing_key", file.Signing, "next", nextFile.Root, "next_signing_key", nextFile.Signing, "err", errors.Join(why...))
	return held, nil
}

// pinRefused reports whether a device has refused a PIN or an authorisation secret.
// Sent again and again a wrong one can lock the device.
func pinRefused(err error) bool { return errors.Is(err, hsm.ErrPIN) || errors.Is(err, tpm.ErrAuth) }

// openSection opens a table's device with the root file that belongs to it.
func openSection(ctx context.Context, s section, file, nextFile rootFile) (*heldRoot, error) {
	dev, err := openDevice(ctx, s.cfg.Device)
	if err != nil {
		return nil, err
	}
	h, err := holdRoot(ctx, s, dev, file, nextFile)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return h, nil
}

func holdRoot(ctx context.Context, s section, dev device, file, nextFile rootFile) (*heldRoot, error) {
	own, err := fingerprint(dev)
	if err != nil {
		return nil, err
	}
	path := rootPath(s.cfg.DataDir)
	if nextFile.Signing == own {
		file, path = nextFile, nextRootPath(s.cfg.DataDir)
	}
	h := &heldRoot{table: s.name, cfg: s.cfg, dev: dev, file: file}
	if h.root, err = file.open(ctx, dev, s.cfg, path); err != nil {
		return nil, err
	}
	h.public, err = dev.SigningKey().Bytes()
	return h, err
}

// openNext opens the next root while the node runs on its present one.
func openNext(ctx context.Context, cfg Config) (*heldRoot, error) {
	if cfg.NextDevice == nil {
		return nil, errors.New("the configuration had no [next_device] when the node was started: add it, run conclaved rekey prepare, and start the node again")
	}
	file, err := readRoot(nextRootPath(cfg.DataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: make it with: conclaved rekey prepare", nextRootPath(cfg.DataDir))
	}
	if err != nil {
		return nil, err
	}
	return openSection(ctx, section{"next_device", cfg.onNext()}, file, file)
}
