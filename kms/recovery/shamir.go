package recovery

import (
	"crypto/rand"
	"io"
	"runtime"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// MaxShares is the largest number of shares: the points of GF(2^8) but zero.
const MaxShares = 255

// Point is a share of Split: the value of every byte's polynomial at X.
type Point struct {
	X byte // not 0
	Y *secret.Bytes
}

// mul multiplies in GF(2^8) modulo x^8+x^4+x^3+x+1 (FIPS 197, section 4.2), in the
// same time for all operands.
func mul(a, b byte) byte {
	var p byte
	for range 8 {
		p ^= -(b & 1) & a
		a = a<<1 ^ -(a>>7)&0x1b
		b >>= 1
	}
	return p
}

// inverse returns a^254, the multiplicative inverse; that of 0 is 0.
func inverse(a byte) byte {
	p := byte(1)
	for range 7 {
		a = mul(a, a)
		p = mul(p, a)
	}
	return p
}

// Split shares a secret among n holders so that any m of their points give it and
// fewer say nothing about it: A. Shamir, "How to share a secret" (CACM 22, 1979),
// byte by byte over the field of FIPS 197, as SLIP-39 does. The points are at 1 to n.
// Randomness is r's, or the system's where r is nil. Errors: kms.Invalid for
// thresholds that cannot be, kms.Internal when there is no randomness or no memory
// that can be locked.
func Split(s *secret.Bytes, m, n int, r io.Reader) ([]Point, error) {
	if m < 1 || n < m || n > MaxShares || s.Len() == 0 {
		return nil, kms.Errorf(kms.Invalid, "a secret of %d bytes cannot be shared %d of %d", s.Len(), m, n)
	}
	if r == nil {
		r = rand.Reader
	}
	size := s.Len()
	coefficients, err := secret.New(max(1, (m-1)*size))
	if err != nil {
		return nil, noMemory(err)
	}
	defer coefficients.Destroy()
	c := coefficients.Reveal()[:(m-1)*size]
	if _, err := io.ReadFull(r, c); err != nil {
		return nil, kms.Wrap(kms.Internal, err, "no randomness to share a secret with", "")
	}
	points := make([]Point, 0, n)
	for x := 1; x <= n; x++ {
		y, err := secret.New(size)
		if err != nil {
			destroy(points)
			return nil, noMemory(err)
		}
		points = append(points, Point{byte(x), y})
		value := y.Reveal()
		for k := m - 2; k >= 0; k-- { // Horner
			for i := range value {
				value[i] = mul(value[i]^c[k*size+i], byte(x))
			}
		}
		for i, b := range s.Reveal() {
			value[i] ^= b
		}
	}
	runtime.KeepAlive(s)
	return points, nil
}

// Combine returns the value at 0 of the polynomials of least degree through the
// points. It is the secret when they are at least as many as the threshold, and says
// nothing about it otherwise: too few are not refused here, they give something
// else. Errors: kms.Invalid for no point, one at 0, two at one place or lengths that
// differ.
func Combine(points []Point) (*secret.Bytes, error) { return interpolate(points, 0) }

// interpolate is Lagrange's interpolation at a place.
func interpolate(points []Point, at byte) (*secret.Bytes, error) {
	if len(points) == 0 || len(points) > MaxShares {
		return nil, kms.Errorf(kms.Invalid, "there are %d shares to put together", len(points))
	}
	size := points[0].Y.Len()
	for i, p := range points {
		if p.X == 0 || p.Y.Len() != size || size == 0 {
			return nil, kms.Errorf(kms.Invalid, "a share has the wrong form")
		}
		for _, q := range points[:i] {
			if p.X == q.X {
				return nil, kms.Errorf(kms.Invalid, "share %d is given twice", p.X)
			}
		}
	}
	out, err := secret.New(size)
	if err != nil {
		return nil, noMemory(err)
	}
	sum := out.Reveal()
	for i, p := range points {
		basis := byte(1) // from the places alone, which are public
		for j, q := range points {
			if i != j {
				basis = mul(basis, mul(q.X^at, inverse(q.X^p.X)))
			}
		}
		for k, b := range p.Y.Reveal() {
			sum[k] ^= mul(b, basis)
		}
		runtime.KeepAlive(p.Y)
	}
	return out, nil
}

func destroy(points []Point) {
	for _, p := range points {
		p.Y.Destroy()
	}
}

func noMemory(err error) error {
	return kms.Wrap(kms.Internal, err, "no memory could be locked for a secret", "raise the limit of locked memory (ulimit -l)")
}
