package tpm

import (
	"bytes"
	"errors"

	"github.com/google/go-tpm/tpm2"
)

const (
	// nvChunk is what every TPM reads from its non-volatile memory at once: the
	// smallest MAX_NV_BUFFER_SIZE of the PC Client profile.
	nvChunk = 512
	// nvMax bounds what is read of one index.
	nvMax = 16 << 10
)

// nvIndex is an area of the TPM's non-volatile memory.
type nvIndex struct {
	public tpm2.TPMSNVPublic
	name   tpm2.TPM2BName
}

func (x *nvIndex) named() tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: x.public.NVIndex, Name: x.name}
}

// auth authorizes access to the index by the empty authorization value of the
// index itself. What is read so is public.
func (x *nvIndex) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: x.public.NVIndex, Name: x.name, Auth: tpm2.PasswordAuth(nil)}
}

// readNVPublic reads what an index is.
func (c *conn) readNVPublic(h tpm2.TPMHandle) (*nvIndex, error) {
	rsp, err := (tpm2.NVReadPublic{NVIndex: h}).Execute(c)
	if err != nil {
		return nil, err
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	name, err := tpm2.NVName(pub)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(name.Buffer, rsp.NVName.Buffer) {
		return nil, unsafe("the name of index %#x is not the digest of its public area", uint32(h))
	}
	return &nvIndex{*pub, *name}, nil
}

// readNV reads an index whole.
func (c *conn) readNV(h tpm2.TPMHandle) ([]byte, error) {
	x, err := c.readNVPublic(h)
	if err != nil {
		return nil, err
	}
	size := int(x.public.DataSize)
	if size > nvMax {
		return nil, unsafe("index %#x has %d bytes", uint32(h), size)
	}
	out := make([]byte, 0, size)
	for len(out) < size {
		rsp, err := (tpm2.NVRead{
			AuthHandle: x.auth(), NVIndex: x.named(), Size: uint16(min(nvChunk, size-len(out))), Offset: uint16(len(out)),
		}).Execute(c)
		if err != nil {
			return nil, err
		}
		if n := len(rsp.Data.Buffer); n == 0 || n > size-len(out) {
			return nil, unavailable("the TPM returned %d bytes of index %#x", n, uint32(h))
		}
		out = append(out, rsp.Data.Buffer...)
	}
	return out, nil
}

// saidNo reports whether err is the TPM's answer to a command and not a broken
// connection or a TPM that was reset: asking for something else may succeed.
func saidNo(c *conn, err error) bool {
	var rc tpm2.TPMRC
	return c.err == nil && errors.As(err, &rc) && !restarted(err) && !distrusts(err) && !errors.Is(err, tpm2.TPMRCLockout)
}
