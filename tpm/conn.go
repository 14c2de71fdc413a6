package tpm

import (
	"encoding/binary"
	"errors"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Back-off between attempts of a command that the TPM put off.
const (
	retryFirst = 2 * time.Millisecond
	retryMax   = 250 * time.Millisecond
)

// conn is the TPM for the length of one call: go-tpm's transport with a
// deadline. After the first transport error it fails at once.
type conn struct {
	link     link
	deadline time.Time
	err      error    // the first transport error
	late     error    // what took too long, if anything did
	seen     [][]byte // responses, wiped at the end: go-tpm decrypts in place
}

// Send implements transport.TPM. It repeats a command that the TPM put off
// (TPM_RC_RETRY, YIELDED, TESTING, NV_RATE) with growing pauses until the
// deadline; the TPM did not act on it, so its session nonces are still good.
func (c *conn) Send(cmd []byte) ([]byte, error) {
	pause := retryFirst
	for {
		if c.err != nil {
			return nil, c.err
		}
		rsp, err := c.link.exchange(cmd, c.deadline)
		if err != nil {
			c.fail(err)
			return nil, c.err
		}
		c.seen = append(c.seen, rsp)
		if !putOff(rsp) {
			return rsp, nil
		}
		if time.Until(c.deadline) < pause {
			c.late = errPutOff
			return rsp, nil
		}
		time.Sleep(pause)
		pause = min(2*pause, retryMax)
	}
}

var errPutOff = errors.New("the TPM put a command off until the time was up")

func putOff(rsp []byte) bool {
	switch tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])) {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate:
		return true
	}
	return false
}

// fail makes the connection unusable: the device must reconnect.
func (c *conn) fail(err error) {
	if c.err == nil {
		if tooLate(err) {
			c.late = err
		}
		c.err = unavailable("no answer from the TPM: %v (check that the device exists and that this user may open it; for swtpm, that it runs)", err)
	}
}

// flush frees a transient object or session. If that fails the device
// reconnects, which frees everything.
func (c *conn) flush(h tpm2.TPMHandle) {
	if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c); err != nil {
		c.fail(errors.New("flushing a handle failed"))
	}
}

func (c *conn) wipe() {
	for _, b := range c.seen {
		secret.Wipe(b)
	}
	c.seen = nil
}

// startup starts the TPM after a reset; one that runs already says
// TPM_RC_INITIALIZE.
func (c *conn) startup() error {
	_, err := (tpm2.Startup{StartupType: tpm2.TPMSUClear}).Execute(c)
	if errors.Is(err, tpm2.TPMRCInitialize) {
		return nil
	}
	return err
}

// flushLeftovers frees what a broken-off call or a killed process left behind.
func (c *conn) flushLeftovers() error {
	for _, first := range []tpm2.TPMHandle{0x80000000, 0x02000000} { // transient objects, loaded sessions
		hs, err := c.handles(first, 64)
		if err != nil {
			return err
		}
		for _, h := range hs {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(c); err != nil && !errors.Is(err, tpm2.TPMRCHandle) {
				return err
			}
		}
	}
	return nil
}

// handles lists the handles of first's type from first on.
func (c *conn) handles(first tpm2.TPMHandle, count uint32) ([]tpm2.TPMHandle, error) {
	rsp, err := (tpm2.GetCapability{
		Capability: tpm2.TPMCapHandles, Property: uint32(first), PropertyCount: count,
	}).Execute(c)
	if err != nil {
		return nil, err
	}
	l, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		return nil, err
	}
	return l.Handle, nil
}

// property reads one TPM_PT property. Sessions, when given, audit the answer.
func (c *conn) property(p tpm2.TPMPT, audit ...tpm2.Session) (uint32, error) {
	rsp, err := (tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: uint32(p), PropertyCount: 1,
	}).Execute(c, audit...)
	if err != nil {
		return 0, err
	}
	l, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return 0, err
	}
	if len(l.TPMProperty) != 1 || l.TPMProperty[0].Property != p {
		return 0, unavailable("the TPM does not report property %#x", uint32(p))
	}
	return l.TPMProperty[0].Value, nil
}
