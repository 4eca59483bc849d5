//! A calendar date, without time or zone.
//!
//! Small enough to own: a date library would be a dependency for one comparison. Two-digit years stand for 1964 (the
//! show's first year) to 2063.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::DataError;

/// A date that exists in the Gregorian calendar. It serialises as `YYYY-MM-DD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Date {
    /// Year.
    pub year: u16,
    /// Month, 1 to 12.
    pub month: u8,
    /// Day of the month, from 1.
    pub day: u8,
}

impl Date {
    /// The date, if it exists.
    #[must_use]
    pub fn new(year: u16, month: u8, day: u8) -> Option<Self> {
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let days = match month {
            2 => 28 + u8::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        (year > 0 && (1..=days).contains(&day)).then_some(Self { year, month, day })
    }

    /// The date so many days after 1970-01-01, as columnar files store it.
    pub(crate) fn from_epoch_days(days: i64) -> Option<Self> {
        // Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self::new(u16::try_from(year).ok()?, month as u8, day as u8)
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        // A time of day after the date is left out.
        let text = text.split(['T', ' ']).next()?;
        let slashes = text.contains('/');
        let mut parts = text.split(if slashes { '/' } else { '-' });
        let (a, b, c) = (number(parts.next()?)?, number(parts.next()?)?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let third = number(c)?;
        if !slashes {
            return Self::new(a, u8::try_from(b).ok()?, u8::try_from(third).ok()?);
        }
        let year = match (c.len(), third) {
            (2, 64..) => 1900 + third,
            (2, _) => 2000 + third,
            (4, _) => third,
            _ => return None,
        };
        Self::new(year, u8::try_from(a).ok()?, u8::try_from(b).ok()?)
    }
}

fn number(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl FromStr for Date {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).ok_or_else(|| DataError::BadDate(text.to_owned()))
    }
}

impl TryFrom<String> for Date {
    type Error = DataError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Date> for String {
    fn from(date: Date) -> Self {
        date.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_are_read() {
        for text in ["2004-12-31", "12/31/04", "12/31/2004", " 2004-12-31T00:00:00 ", "2004-12-31 00:00:00"] {
            assert_eq!(text.parse::<Date>().unwrap().to_string(), "2004-12-31", "{text}");
        }
        assert_eq!("9/1/84".parse::<Date>().unwrap().to_string(), "1984-09-01");
    }

    #[test]
    fn what_is_no_date_is_refused() {
        for text in ["", "2004-02-30", "13/1/04", "2004-12", "2004-12-31-1", "+4-1-1", "1/1/204", "today"] {
            assert!(text.parse::<Date>().is_err(), "{text}");
        }
        assert!("2100-02-29".parse::<Date>().is_err());
        assert!("2000-02-29".parse::<Date>().is_ok());
    }

    #[test]
    fn order_is_calendar_order() {
        let date = |text: &str| text.parse::<Date>().unwrap();
        assert!(date("1999-12-31") < date("2000-01-01"));
        assert!(date("2000-01-31") < date("2000-02-01"));
    }

    #[test]
    fn days_of_the_epoch() {
        assert_eq!(Date::from_epoch_days(0).unwrap().to_string(), "1970-01-01");
        assert_eq!(Date::from_epoch_days(12_783).unwrap().to_string(), "2004-12-31");
        assert_eq!(Date::from_epoch_days(-1).unwrap().to_string(), "1969-12-31");
    }
}
